"""The scene layer: between Slicer's nodes and SAMAdaptLib's volumes, prompts and masks.

Every function takes the nodes it works on. Nothing here looks a node up by its display name, takes the first
volume of a scene, or removes a node that it did not make. torch is never imported.
"""
