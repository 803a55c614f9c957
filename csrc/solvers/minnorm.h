#pragma once
#include "problem.h"
