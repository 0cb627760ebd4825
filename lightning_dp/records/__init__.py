"""What a run leaves on disk: statement, journal, checkpoints that can be trusted."""
