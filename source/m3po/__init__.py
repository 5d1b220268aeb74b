"""M3PO: massively multi-task model-based policy optimization on thousands of environments."""
