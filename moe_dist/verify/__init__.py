"""`moe-dist verify`: the proof, on the user's own machine, that a config means the same in every layout."""
