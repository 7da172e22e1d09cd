"""AutoSpace (Zhou et al., arXiv:2103.11833): the space of cells is evolved first (``space``), a network is then
searched in it (``nas``). No code was released; what the paper leaves open is chosen here, and said where it is.

Cells and the files that hold them are in ``distillkit.models.autospace_cells`` and ``autospace_network``.
"""
