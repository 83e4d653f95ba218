"""`medpsp new`: a configuration proposed from headers, labels and the machine, with reasons.

`evidence` gathers what is there, `proposal` decides.
"""
