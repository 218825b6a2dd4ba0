from flashtrace_inseq.cli import main

main()
