"""``python -m flashtrace_plugin`` is the command line."""

from flashtrace_plugin.cli.app import main

if __name__ == "__main__":
    main()
