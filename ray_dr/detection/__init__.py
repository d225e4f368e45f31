"""Is something wrong, and what: detectors turn samples into findings, classification turns findings into one diagnosis.

Theory of operation. A *sample* (model.signal) is something that was said: an agent's report with its workers' beacons, a
step that a rank has done, a closed connection, that time passes. A *detector*, one per file, remembers what it needs and
answers each sample with *findings*: whom it suspects of what, since when, on what evidence. `classify` looks at the findings
of one moment and says what the root cause is, what is only its echo and why, and what it means for the job (`taxonomy`).
All of it is pure: the same samples give the same findings, in the supervisor, in the simulator and in a replay.

How a host drives it. One `Detection` per job, touched by the host's one thread:

1. `Formed` when a group forms (and with no members when it is broken), before any other sample of that attempt.
2. For each report of an agent a `Report`, also for one without news: its coming is the sign of life. `at` is the host's
   monotonic time on receipt; `clock` and `since` are the node's own. Each step record becomes a `StepDone`, each exception
   a `Raised`. Reports of unwatched agents, or of attempts gone by, do no harm.
3. `Now` every 0.1 s, whatever else comes; a host that does not say the time for half a second is taken to have slept, and
   what it did not hear meanwhile is no evidence.
4. `Noticed` when Ray or a cloud says that a node will go; `Closed` when an agent's connection breaks; `RayWord` when Ray
   changes its mind about a node; and `Released` *before* the host itself ends a worker or gives a node back.
5. The findings go to the journal, every one. Those that are confirmed, and not in the shadow, start an incident:
   `classify(findings of the last minutes, past=...)` names its root cause, and is asked again when a further finding comes
   while the incident is open, as a cause is sometimes seen after its echo. A suspicion is a reason to look (stacks, a
   warm standby, no promotion of checkpoints), not to act; so is everything with `shadow`.

Cost: a report O(its beacons and peers), a step O(ranks), a `Now` O(nodes), and O(ranks) four times a second. Memory: some
hundred numbers per node, some hundred per rank, 512 step times.

A new detector: a file here with `name`, `hears` and `observe`, a line in `detectors.DETECTORS`, and its budget of false alarms
in its docstring. It proves itself in the shadow (`Detection(shadow=...)`) before anybody acts on it.
"""
