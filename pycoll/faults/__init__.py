"""A campaign of faults: random collectives among ranks that are killed, stopped, delayed or made to raise.

script.py draws from a seed what is to happen, operations.py and values.py say which calls there are and what they ought
to give, rank.py and fronts.py are a rank, server.py forks the ranks and brings the fault upon them, verdict.py judges
what they report, and campaign.py is the command `pycoll faults`.
"""
