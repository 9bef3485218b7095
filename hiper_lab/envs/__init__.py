"""Text environments with one Gymnasium-style interface; import the module you need.

``household`` plays ALFWorld game files in pure Python, ``games`` generates such games;
``probes`` are tiny decision processes on which every number of the theory is exact.
"""
