"""Looking at models: how near they come to another one, what is in one."""
