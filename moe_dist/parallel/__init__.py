"""Layouts, process groups, differentiable collectives, and the layers and loss that are cut over them."""
