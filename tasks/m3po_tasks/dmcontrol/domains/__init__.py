"""One file per domain: its model, initial states, observation and reward; ``TASKS`` maps task names to constructors."""
