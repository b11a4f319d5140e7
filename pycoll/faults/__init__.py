"""A campaign of faults: random collectives among ranks that are killed, stopped, delayed or made to raise.

script.py draws from a seed what is to happen, operations.py and values.py say which calls there are and what they ought
to give, rank.py is a rank, with performer.py for its threads, and member.py and fronts.py for its groups, server.py
forks the ranks and brings the fault upon them, verdict.py judges what they report, and campaign.py is the command
`pycoll faults`.
"""
