"""`moe-dist compare`: a few runs side by side on one page, also runs that belong to no study."""
