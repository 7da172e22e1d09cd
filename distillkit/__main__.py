"""`python -m distillkit`, and what `accelerate launch -m distillkit` starts."""

from distillkit.cli import main

if __name__ == "__main__":
    main()
