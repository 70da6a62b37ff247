"""`python -m nih_sched` is `scheduler`."""

from nih_sched.cli import main

if __name__ == "__main__":
    main()
