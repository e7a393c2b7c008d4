"""The statistics of capacity-factor studies: pure functions of numbers, which know no files, runs or ledgers.

| module        | answers                                                                                    |
|---------------|--------------------------------------------------------------------------------------------|
| samples.py    | values by seed, intervals of a mean, which seeds a draw of the bootstrap takes             |
| paired.py     | is a point's loss another than the baseline's, or equivalent, or can it not be told        |
| power.py      | how large the noise is, and which effect so many seeds can show                            |
| ties.py       | which points cannot be told apart, instead of a ranking                                    |
| drops.py      | which drops chance alone explains, which the experts' unequal shares                       |
| exchange.py   | loss against compute: the law of a ladder, and whether it predicts the largest size        |
| speed.py      | what a loss and a throughput are worth together, against the baseline                      |
| scaling.py    | loss in active parameters, experts and tokens, with the capacity factor beside             |
| pareto.py     | which points nothing cheaper beats, and which factor to recommend                          |

Seeds are the unit everywhere: tokens, steps and layers of one run are not repetitions. Fewer than three seeds give no
interval. A number that is not finite, and a seed that one side lacks, are named and never left out in silence.

scaling.py needs the extra `study` (statsmodels). All of it is imported where it is used: scipy is slow to load.
"""
