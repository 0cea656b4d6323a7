"""The recipe: what is quantized (`plan`), one weight (`layer`), a whole model (`model`)."""
