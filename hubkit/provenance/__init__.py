"""Where an entry comes from and what is in it: lineage, anatomy, the spectrum of its change, red flags.

Nothing here can tell a good adapter from one with a backdoor: a flag is a reason to look closer, no flag is no proof.
"""
