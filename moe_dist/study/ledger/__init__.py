"""What is known of the points that have ended, and of what happened within them."""
