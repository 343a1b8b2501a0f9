"""What everybody needs and nobody decides: settings, errors, exit codes."""
