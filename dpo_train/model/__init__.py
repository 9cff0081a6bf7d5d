"""The policy and its reference.

folder --load.load_policy--> Policy (decoder, vocabulary matrix, trainable parameters)
token pairs --rows.build_row--> Row --score.row_logps--> per-token log-probs of each answer
trainable parameters <--> checkpoint (resume) ; Policy --load.save_policy--> adapter or model folder
"""
