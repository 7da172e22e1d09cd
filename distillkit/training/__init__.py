"""What `distillkit run` does with a recipe: builds the objects, trains each job, compares them, writes the report."""
