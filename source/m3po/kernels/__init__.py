"""Device kernels and their torch references, one file per kernel; the only place that imports Warp."""
