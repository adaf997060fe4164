"""`python -m diffaccel`: the command, for launchers that start modules."""

from diffaccel.cli.app import main

if __name__ == "__main__":
    main()
