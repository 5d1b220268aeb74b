"""Backends of Isaac Lab's command line: modules with ``run(argv)``, named in :mod:`isaaclab_m3po.registration`."""
