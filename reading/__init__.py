"""From a place to pixels: where images lie, what their files hold, and what is cut out of them."""
