"""Methods compared on the same data order, initial weights, steps and seeds: ``slope compare``.

``plan`` reads what is to be run, ``runner`` runs it in processes of ``worker``, ``results`` reads
what the runs left, ``table`` and ``figure`` show it. Only the workers import torch.
"""
