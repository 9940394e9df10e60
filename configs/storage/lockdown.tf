# Written by wmguard storage lockdown for s3://acme-models/triage

resource "aws_s3_bucket_versioning" "wmguard" {
  bucket = "acme-models"
  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_ownership_controls" "wmguard" {
  bucket = "acme-models"
  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "wmguard" {
  bucket = "acme-models"
  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "wmguard" {
  bucket = "acme-models"
  rule {
    id = "wmguard-abort-incomplete-uploads"
    status = "Enabled"
    filter {}
    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
  }
}

resource "aws_s3_bucket_public_access_block" "wmguard" {
  bucket = "acme-models"
  block_public_acls = true
  ignore_public_acls = true
  block_public_policy = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_policy" "wmguard" {
  bucket = "acme-models"
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Sid = "WmguardReadObjects"
        Effect = "Allow"
        Principal = {
          AWS = [
            "arn:aws:iam::123456789012:role/inference",
          ]
        }
        Action = [
          "s3:GetObject",
          "s3:GetObjectVersion",
        ]
        Resource = [
          "arn:aws:s3:::acme-models/triage/*",
        ]
      },
      {
        Sid = "WmguardListObjects"
        Effect = "Allow"
        Principal = {
          AWS = [
            "arn:aws:iam::123456789012:role/inference",
          ]
        }
        Action = [
          "s3:ListBucket",
        ]
        Resource = [
          "arn:aws:s3:::acme-models",
        ]
        Condition = {
          StringLike = {
            "s3:prefix" = [
              "triage/*",
            ]
          }
        }
      },
      {
        Sid = "WmguardWriteObjects"
        Effect = "Allow"
        Principal = {
          AWS = [
            "arn:aws:iam::123456789012:role/trainer",
          ]
        }
        Action = [
          "s3:GetObject",
          "s3:GetObjectVersion",
          "s3:PutObject",
          "s3:AbortMultipartUpload",
          "s3:ListMultipartUploadParts",
        ]
        Resource = [
          "arn:aws:s3:::acme-models/triage/*",
        ]
      },
      {
        Sid = "WmguardLookBeforeWriting"
        Effect = "Allow"
        Principal = {
          AWS = [
            "arn:aws:iam::123456789012:role/trainer",
          ]
        }
        Action = [
          "s3:ListBucket",
          "s3:ListBucketMultipartUploads",
          "s3:GetBucketPublicAccessBlock",
          "s3:GetBucketPolicyStatus",
          "s3:GetBucketAcl",
        ]
        Resource = [
          "arn:aws:s3:::acme-models",
        ]
      },
      {
        Sid = "WmguardAdminister"
        Effect = "Allow"
        Principal = {
          AWS = [
            "arn:aws:iam::123456789012:role/break-glass",
          ]
        }
        Action = [
          "s3:*",
        ]
        Resource = [
          "arn:aws:s3:::acme-models",
          "arn:aws:s3:::acme-models/*",
        ]
      },
      {
        Sid = "WmguardDenyPlainHttp"
        Effect = "Deny"
        Principal = "*"
        Action = "s3:*"
        Resource = [
          "arn:aws:s3:::acme-models",
          "arn:aws:s3:::acme-models/*",
        ]
        Condition = {
          Bool = {
            "aws:SecureTransport" = "false"
          }
        }
      },
      {
        Sid = "WmguardDenyOthers"
        Effect = "Deny"
        Principal = "*"
        Action = "s3:*"
        Resource = [
          "arn:aws:s3:::acme-models",
          "arn:aws:s3:::acme-models/*",
        ]
        Condition = {
          ArnNotLike = {
            "aws:PrincipalArn" = [
              "arn:aws:iam::123456789012:role/inference",
              "arn:aws:iam::123456789012:role/trainer",
              "arn:aws:iam::123456789012:role/break-glass",
            ]
          }
          BoolIfExists = {
            "aws:PrincipalIsAWSService" = "false"
          }
        }
      },
      {
        Sid = "WmguardDenyMoreToReaders"
        Effect = "Deny"
        Principal = "*"
        NotAction = [
          "s3:GetObject",
          "s3:GetObjectVersion",
          "s3:ListBucket",
        ]
        Resource = [
          "arn:aws:s3:::acme-models",
          "arn:aws:s3:::acme-models/*",
        ]
        Condition = {
          ArnNotLike = {
            "aws:PrincipalArn" = [
              "arn:aws:iam::123456789012:role/trainer",
              "arn:aws:iam::123456789012:role/break-glass",
            ]
          }
          BoolIfExists = {
            "aws:PrincipalIsAWSService" = "false"
          }
        }
      },
      {
        Sid = "WmguardDenyAdministration"
        Effect = "Deny"
        Principal = "*"
        NotAction = [
          "s3:GetObject",
          "s3:GetObjectVersion",
          "s3:PutObject",
          "s3:AbortMultipartUpload",
          "s3:ListMultipartUploadParts",
          "s3:ListBucket",
          "s3:ListBucketMultipartUploads",
          "s3:GetBucketPublicAccessBlock",
          "s3:GetBucketPolicyStatus",
          "s3:GetBucketAcl",
        ]
        Resource = [
          "arn:aws:s3:::acme-models",
          "arn:aws:s3:::acme-models/*",
        ]
        Condition = {
          ArnNotLike = {
            "aws:PrincipalArn" = [
              "arn:aws:iam::123456789012:role/break-glass",
            ]
          }
          BoolIfExists = {
            "aws:PrincipalIsAWSService" = "false"
          }
        }
      },
      {
        Sid = "WmguardDenyOtherObjects"
        Effect = "Deny"
        Principal = "*"
        Action = "s3:*"
        NotResource = [
          "arn:aws:s3:::acme-models",
          "arn:aws:s3:::acme-models/triage/*",
        ]
        Condition = {
          ArnNotLike = {
            "aws:PrincipalArn" = [
              "arn:aws:iam::123456789012:role/break-glass",
            ]
          }
          BoolIfExists = {
            "aws:PrincipalIsAWSService" = "false"
          }
        }
      },
      {
        Sid = "WmguardDenyOtherListings"
        Effect = "Deny"
        Principal = "*"
        Action = [
          "s3:ListBucket",
        ]
        Resource = [
          "arn:aws:s3:::acme-models",
        ]
        Condition = {
          StringNotLike = {
            "s3:prefix" = [
              "triage/*",
            ]
          }
          ArnNotLike = {
            "aws:PrincipalArn" = [
              "arn:aws:iam::123456789012:role/trainer",
              "arn:aws:iam::123456789012:role/break-glass",
            ]
          }
          BoolIfExists = {
            "aws:PrincipalIsAWSService" = "false"
          }
        }
      },
    ]
  })
}
