"""What fits where and how fast it will be, from configurations and file headers alone."""
