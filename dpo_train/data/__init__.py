"""Raw preference data to token pairs and batches.

sources.plan_blocks -> read_block -> validate.validate -> tokens.PairTokenizer -> one outcome row per record
outcomes --select.select_pairs--> pairs by split + rejections       (records = used + rejected)
batches.step_pairs: step -> indices of its pairs;  packing.pack: lengths -> rows;  batches.rank_rows: rows -> ranks
"""
