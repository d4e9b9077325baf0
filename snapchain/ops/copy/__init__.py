"""Copy: points of one destination go to another one: a second site, or another bucket."""
