"""The one command ``unike``, and those of its subcommands that are no room of their own."""
