"""The subcommands of `ocvtp`, one a module: `add(subparsers)` declares it, its `run(args)` does it."""
