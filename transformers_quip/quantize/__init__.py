"""The recipe: what is quantized (`plan`), one weight (`layer`), one block (`block`), a whole model (`recipe`)."""
