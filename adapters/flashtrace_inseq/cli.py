"""Inseq's command line with the methods of this package: ``python -m flashtrace_inseq attribute …``.

Inseq's own ``inseq`` command fixes its choice of methods before any plugin could be imported.
"""


def main() -> None:
    """Runs Inseq's command line; arguments as for ``inseq``, options of a method as ``--attribution_kwargs``."""
    # Not at the top: this reads the names of the methods, which importing the package has registered by now.
    from inseq.commands.cli import main as inseq_main

    inseq_main()
