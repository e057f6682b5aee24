"""The command line: options, what commands do, what people see."""
