"""M3PO for Isaac Lab: registration, agent configurations, embedded assets and launch glue.

Importing this package imports neither Isaac Lab nor omni. Isaac Lab loads :mod:`isaaclab_m3po.registration` through the
``isaaclab.tasks`` entry point, Kit loads :mod:`isaaclab_m3po.extension`.
"""
