"""The former name of `python -m sampling.side_by_side`."""

from miscc.errors import run_command
from sampling.side_by_side import main

if __name__ == "__main__":
    run_command(main)
