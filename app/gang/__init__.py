"""The nodes of one job: coordinator, participants, rounds, verdict. docs/gang.md tells how they behave.

connection.py                  one line of JSON with its MAC
handshake.py                   admission: both sides prove the token, or the connection is closed within 5 s
messages.py                    what is said, every field checked
connect.py                     how a node comes to node 0, and how anybody who waits says for whom
membership.py                  who is connected, under which name, alive, and why the others are missing
session.py                     the coordinator's side of every job: roll call, presence, questions, the reach test
agreement.py                   what must agree, and the table of what does not
probes.py, connectivity.py     listening and dialling; who reaches whom (pure)
round.py, verdict.py           one round's course; the first cause among many failures (pure)
coordinator.py, participant.py the two that use all this
services.py                    what a participant needs of its node
"""
