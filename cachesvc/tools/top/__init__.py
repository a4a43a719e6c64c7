"""`kvist top`: a live view of a running kvistd."""
