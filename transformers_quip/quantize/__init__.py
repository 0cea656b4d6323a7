"""The recipe: the choice of modules (`plan`), one weight (`layer`), one block (`block`), a whole model (`recipe`)."""
