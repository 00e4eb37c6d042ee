"""`python -m shoal` is the command line. It knows nothing else."""

from shoal.cli import main

if __name__ == "__main__":
    main()
