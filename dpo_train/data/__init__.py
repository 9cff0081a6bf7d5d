"""Raw preference data to token pairs and batches.

sources.plan -> Block -> BlockReader -> formats.candidates -> tokens.PairTokenizer -> candidates, in parts on disk
parts --work.Buckets--> a range of prompts --select.decide--> shards of pairs + rejections (records = used + rejected)
                                           --profile--> report
shards.Split: an output's pairs whole, shard by shard, or pair by pair;   known.KnownScores: what is scored already
batches.step_pairs: step -> indices of its pairs;  packing.pack: lengths -> rows;  batches.rank_rows: rows -> ranks
"""
