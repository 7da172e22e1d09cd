"""Other people's training programs and packages: thin modules that bring distillkit into them."""
