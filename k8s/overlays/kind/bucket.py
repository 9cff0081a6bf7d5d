"""Makes the bucket of MLflow's artifacts on the cluster's own S3 server, if it is not there."""

import os
from urllib.parse import urlsplit

import boto3
from botocore.config import Config

bucket = urlsplit(os.environ["MLFLOW_ARTIFACTS_DESTINATION"]).netloc
# The server may still be starting: twenty attempts are some four minutes.
retries = Config(retries={"total_max_attempts": 20, "mode": "standard"}, connect_timeout=5)
s3 = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"], region_name="us-east-1", config=retries)
if bucket in {found["Name"] for found in s3.list_buckets()["Buckets"]}:
    print(f"{bucket} is there")
else:
    s3.create_bucket(Bucket=bucket)
    print(f"{bucket} made")
