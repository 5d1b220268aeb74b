"""Commands for task suites and for several tasks at once: what Isaac Lab's own command line does not know."""
