"""`python -m diffaccel`: the command, for launchers that start modules."""

from diffaccel.cli import main

if __name__ == "__main__":
    main()
