"""What happened, as a table."""
