"""Environments: task suites, and the composition of several tasks into one batch."""
