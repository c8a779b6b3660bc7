"""`python -m peftfn`: the same command line as `peftfn`."""

from peftfn.cli import main

if __name__ == "__main__":
    main()
