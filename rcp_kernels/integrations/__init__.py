"""One module for each other library. It imports that library and no other of them."""
